"""What processes of a run say to each other, and what each makes of it: events in, effects out. No socket, thread, lock or clock."""
