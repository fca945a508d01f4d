"""The forge: a pure plan of steps with content keys, and the executor that runs what is not in the store yet."""
