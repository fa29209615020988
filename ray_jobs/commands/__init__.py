"""One file a command of ``ca2st``. Modules here import nothing heavy: ``ca2st --help`` answers at once."""
