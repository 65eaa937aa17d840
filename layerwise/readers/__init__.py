"""Raw rows from files, folders and libraries. Every complaint is a `DataError` that names the file and the row.

Decision: a reader only finds rows; `columns` gives them the names that adapters know, and the adapter makes tensors of them.
"""

from __future__ import annotations

from layerwise.readers.same import SameDataWarning, warn_if_same
from layerwise.readers.specs import FORMS, read
from layerwise.readers.table import Request, Table

__all__ = ["FORMS", "Request", "SameDataWarning", "Table", "read", "warn_if_same"]
