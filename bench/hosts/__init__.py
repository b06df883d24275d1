"""Losses of `fastclip.integrations` beside those of their hosts, on embeddings that are given."""
