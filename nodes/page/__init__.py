"""How nodes look in ComfyUI's page: where they are found, and what their widgets show."""
