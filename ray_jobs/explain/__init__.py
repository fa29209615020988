"""What the experts of a model listened to in a video, as one HTML page that needs nothing but itself."""
