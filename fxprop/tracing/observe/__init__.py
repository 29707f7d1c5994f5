"""What a run of the model shows: shapes, operators, writes, random numbers; and that it leaves no trace."""
