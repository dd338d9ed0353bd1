"""The quickstart's own data and models: generated rows, a tiny teacher and a tinier student."""
