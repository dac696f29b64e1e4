"""What ComfyUI's page makes of nodes, and how it gets the pack's workflows."""
