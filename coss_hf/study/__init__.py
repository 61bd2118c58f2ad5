"""Many runs under one protocol: choices on held-out images, test read once per reported trial, finished trials kept."""
