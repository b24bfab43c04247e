"""What several test modules share: servers, peers, streams, certificates, traces and checks."""
