"""Rows: `sources` reads and checks them, `encoding` makes tokens and labels, `sampler` orders them."""
