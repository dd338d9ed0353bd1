"""Teacher sources: what gives hidden states and a head for a batch. One file each."""
