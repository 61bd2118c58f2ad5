"""Many runs under one protocol: choices on held-out images, test read once a reported cell, finished cells kept."""
