"""One interface for text, images, audio, video and in-memory batches."""
