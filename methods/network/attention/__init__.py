"""Attention: what its heads are to a cut.

Read `heads`, which drafts channel groups of whole heads; `methods.network.proof` tries them.
"""
