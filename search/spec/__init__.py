"""The YAML file, read and checked.

Read `schema` first (every key), then `reading` (a file becomes a `SearchSpec`, or all its mistakes), `amounts` (`50%`,
`12ms`), `contradictions` (between keys), `documents` (YAML with places) and `targets` (budgets in absolute units).
"""

from search.spec.reading import load, parse
from search.spec.schema import SearchSpec

__all__ = ["SearchSpec", "load", "parse"]
