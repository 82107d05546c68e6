"""Attention: what its heads are to a cut, and attention of ours for networks that keep its weights out of reach.

Read `heads` first, which drafts channel groups of whole heads for `methods.network.proof` to try; then `opened`, which
puts `joint` (torch's self-attention) and `windows` (torchvision's of Swin) in place of those.
"""
