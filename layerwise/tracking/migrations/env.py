"""Alembic's entry point. The connection, its transaction and its lock belong to `layerwise.tracking.schema.upgrade`."""

from __future__ import annotations

from alembic import context

from layerwise.tracking.models import Base
from layerwise.tracking.schema import VERSION_TABLE

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,  # SQLite can do it too, once the driver no longer commits behind our back
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
