"""What is only needed where Dynamo traces: the loop as one `scan`, and what Inductor is told. Imported there."""
