"""Rows: `sources` reads and checks, `encoding` makes tokens and labels, `sampler` orders them."""
