"""A service that tests may call as often as they like, behind its token."""

from __future__ import annotations

from starlette.types import ASGIApp

from search.service.app import Settings, app
from search.service.guard import Door, digest_of
from search.service.watching import Place

TOKEN = "a token of some length"
KEY = {"Authorization": f"Bearer {TOKEN}"}
YAML = {"Content-Type": "application/yaml"}


def quick(where: Place, **options: object) -> ASGIApp:
    """The app, with other settings as `options`."""
    return app(Settings(where, door=Door(digest_of(TOKEN.encode()), 1e6, 1e6), **options))
