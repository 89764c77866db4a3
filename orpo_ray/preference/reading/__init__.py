"""Reading source files, local or remote, in any supported format, as raw rows."""
