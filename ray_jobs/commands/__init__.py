"""The commands of ``ca2st``, a file per group. Modules here import nothing heavy: ``ca2st --help`` answers at once."""
