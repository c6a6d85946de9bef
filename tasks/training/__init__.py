"""DPO of an SFT adapter in a child process: exact, resumable and checked against its invariants."""
