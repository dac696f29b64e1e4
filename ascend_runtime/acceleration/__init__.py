"""What a job leaves out: caches of attention, blocks and steps, and sparse attention. Each tells what it left out."""
