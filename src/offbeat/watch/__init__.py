"""Watching a run while it goes on: its folder is read as it grows, never the run itself.

`follow` reads, `view` adds up, `web` shows it as a page and as metrics, `..tracking` passes it on to trackers, `beside` has all of
that in a process of its own. Nothing here imports torch.
"""
