"""The tables. `Run`: one compression that was measured; `LayerScoreRow`: what one method said of one layer;
`FaithfulnessRow`: how well one method ordered one model's layers in a benchmark.

Decision: what is filtered and joined on is a column, what is only read back is JSON (JSONB on PostgreSQL). Numbers that
JSON lacks (NaN of a proof that measures nothing, an infinite perplexity) are wrapped, so that they come back as they went.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Double, ForeignKey, String, Text, TypeDecorator, UniqueConstraint
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DOMAINS = ("text", "vision", "audio", "multimodal", "graph", "tabular", "other")
FLOAT = "$float"


def plain(value: Any) -> Any:
    """`value` as strict JSON: tuples become lists, numpy numbers numbers, unknown objects their text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # PostgreSQL stores neither null characters nor lone surrogates.
        return str(value).replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else {FLOAT: str(number)}
    if isinstance(value, Mapping):
        return {plain(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return plain(str(value))


def restored(value: Any) -> Any:
    """The inverse of `plain`, up to the types that JSON does not know."""
    if isinstance(value, dict):
        return float(value[FLOAT]) if value.keys() == {FLOAT} else {k: restored(v) for k, v in value.items()}
    return [restored(v) for v in value] if isinstance(value, list) else value


class PlainJSON(TypeDecorator[Any]):
    """JSON, or JSONB on PostgreSQL, of `plain` values."""

    impl = JSON().with_variant(JSONB(), "postgresql")
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return plain(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return restored(value)


class UTCDateTime(TypeDecorator[datetime]):
    """A moment in UTC; SQLite forgets time zones, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class Base(DeclarativeBase):
    pass


class Run(Base):
    """One model before and after one plan, on one data set and device.

    `ratio` is bytes after over bytes before. `before` and `after` are `Measurement.to_dict()`. `proven` means that at least
    one proof passed and none failed. `methods` compressed, `analyzers` scored the layers; `report` is the digest under which
    those scores are kept. `parent_id` is the run whose result this one started from.
    """

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    created: Mapped[datetime] = mapped_column(UTCDateTime)
    model: Mapped[str] = mapped_column(Text, index=True)
    source: Mapped[dict[str, Any]] = mapped_column(PlainJSON)
    fingerprint: Mapped[str] = mapped_column(Text)
    domain: Mapped[str] = mapped_column(String(16), index=True)
    task: Mapped[str] = mapped_column(Text, index=True)
    data: Mapped[str] = mapped_column(Text)
    data_fingerprint: Mapped[str] = mapped_column(Text)
    plan_digest: Mapped[str] = mapped_column(String(64), index=True)
    plan: Mapped[dict[str, Any]] = mapped_column(PlainJSON)
    methods: Mapped[list[str]] = mapped_column(PlainJSON)
    analyzers: Mapped[list[str]] = mapped_column(PlainJSON)
    ratio: Mapped[float | None] = mapped_column(Double)
    before: Mapped[dict[str, Any]] = mapped_column(PlainJSON)
    after: Mapped[dict[str, Any]] = mapped_column(PlainJSON)
    proofs: Mapped[list[dict[str, Any]]] = mapped_column(PlainJSON)
    proven: Mapped[bool]
    device: Mapped[str] = mapped_column(Text)
    software: Mapped[dict[str, str]] = mapped_column(PlainJSON)
    seed: Mapped[int] = mapped_column(BigInteger)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id"), index=True)
    folder: Mapped[str | None] = mapped_column(Text)
    report: Mapped[str | None] = mapped_column(String(64))


class LayerScoreRow(Base):
    """One method's score of one layer in the report with this digest; no `score` and `rank` where `status` says why."""

    __tablename__ = "layer_scores"
    __table_args__ = (UniqueConstraint("report", "method", "layer", name="uq_layer_scores_entry"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    report: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime] = mapped_column(UTCDateTime)
    model: Mapped[str] = mapped_column(Text, index=True)
    fingerprint: Mapped[str] = mapped_column(Text)
    domain: Mapped[str] = mapped_column(String(16), index=True)
    task: Mapped[str] = mapped_column(Text)
    data: Mapped[str] = mapped_column(Text)
    method: Mapped[str] = mapped_column(Text)
    layer: Mapped[str] = mapped_column(Text)
    position: Mapped[int]
    score: Mapped[float | None] = mapped_column(Double)
    stderr: Mapped[float | None] = mapped_column(Double)
    rank: Mapped[int | None]
    status: Mapped[str] = mapped_column(String(16))
    seconds: Mapped[float] = mapped_column(Double)
    samples: Mapped[int]


class FaithfulnessRow(Base):
    """How well one method's scores order one model's layers by a measured damage, in the benchmark with this digest.

    `rho`, `low`, `high`: Spearman and its 95 % interval over samples; `tau`: Kendall; `p`: by permutation; `partial`: given depth
    and log parameters; `score`: rho / √reliability. The protocol is that of `layerwise.benchmark`.
    """

    __tablename__ = "faithfulness"
    __table_args__ = (UniqueConstraint("benchmark", "model", "method", "damage", "metric", name="uq_faithfulness_entry"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    benchmark: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime] = mapped_column(UTCDateTime)
    protocol: Mapped[int]
    model: Mapped[str] = mapped_column(Text, index=True)
    domain: Mapped[str] = mapped_column(String(16))
    method: Mapped[str] = mapped_column(Text, index=True)
    damage: Mapped[str] = mapped_column(String(32))
    metric: Mapped[str] = mapped_column(String(32))
    layers: Mapped[int]
    rho: Mapped[float] = mapped_column(Double)
    low: Mapped[float | None] = mapped_column(Double)
    high: Mapped[float | None] = mapped_column(Double)
    tau: Mapped[float | None] = mapped_column(Double)
    p: Mapped[float | None] = mapped_column(Double)
    partial: Mapped[float | None] = mapped_column(Double)
    score: Mapped[float | None] = mapped_column(Double)
