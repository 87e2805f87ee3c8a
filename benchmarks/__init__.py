"""What a user of the repository runs; a package, because others install one of this name into ``site-packages``."""
