"""A search from afar: as a Ray job, over HTTP, with a page.

Read `submit` and `probe` (a job), then `app` (HTTP), `guard` and `admission` (who may ask for what), `watching` (what
the page sees) and `metadata`.
"""
