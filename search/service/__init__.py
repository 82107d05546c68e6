"""A search from afar: as a Ray job, over HTTP, with a page.

Read `submit` and `probe` (a job), then `app` (HTTP), `guard` and `admission` (callers and specs it refuses), `watching`
(the state of a search, for pages and programs) and `metadata` (names that jobs carry).
"""
