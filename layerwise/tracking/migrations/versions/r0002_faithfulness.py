"""Faithfulness: how well each method ordered the layers of each model of a benchmark. Frozen, as every migration."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "faithfulness",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("benchmark", sa.String(64), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("protocol", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("domain", sa.String(16), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("damage", sa.String(32), nullable=False),
        sa.Column("metric", sa.String(32), nullable=False),
        sa.Column("layers", sa.Integer(), nullable=False),
        sa.Column("rho", sa.Double(), nullable=False),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("tau", sa.Double(), nullable=True),
        sa.Column("p", sa.Double(), nullable=True),
        sa.Column("partial", sa.Double(), nullable=True),
        sa.Column("score", sa.Double(), nullable=True),
        sa.UniqueConstraint("benchmark", "model", "method", "damage", "metric", name="uq_faithfulness_entry"),
    )
    for column in ("model", "method"):
        op.create_index(f"ix_faithfulness_{column}", "faithfulness", [column])


def downgrade() -> None:
    op.drop_table("faithfulness")
