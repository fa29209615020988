"""From a media file to the stored clip: probe, cut, encode, spectrogram; nothing here knows shards."""
