"""The service on a cluster: what runs where, and the files that say so."""
