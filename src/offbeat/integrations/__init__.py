"""Training loops of other libraries, one module for each: import that one."""
