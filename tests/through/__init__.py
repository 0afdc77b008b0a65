"""`accumulate(through=)`: losses over the whole batch."""
