"""Models: `loading` finds and opens them, `heads` splits off the LM head, `generation` answers."""
