"""The pages in a real browser: `make browser-check`, outside of `make test`."""
