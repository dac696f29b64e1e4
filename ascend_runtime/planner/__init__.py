"""What a job costs under a plan, on a card: FLOPs, bytes sent, bytes held, bytes read, seconds; and the fastest plan
that fits.

`facts` describes what is asked, and on what; `memory`, `exchange` and `seconds` predict; `choice` chooses.
"""
