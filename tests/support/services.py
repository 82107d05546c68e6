"""A service that tests may call as often as they like, behind its token."""

from __future__ import annotations

from starlette.types import ASGIApp

from search.service.app import Settings, app
from search.service.guard import Access, digest_of
from search.service.watching import Backends

TOKEN = "a token of some length"
KEY = {"Authorization": f"Bearer {TOKEN}"}
YAML = {"Content-Type": "application/yaml"}


def quick(where: Backends, **options: object) -> ASGIApp:
    """Build the app, with other settings as `options`."""
    return app(Settings(where, access=Access(digest_of(TOKEN.encode()), 1e6, 1e6), **options))
