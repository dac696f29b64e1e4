"""What the scripts and the tests share: environments, a ComfyUI, a browser. Mostly the standard library only."""
