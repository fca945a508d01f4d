"""A third party's toolchain, as docs/guides/new-compiler.md shows it: a double, not a vendor's."""
