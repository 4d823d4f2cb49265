package connpooltest

import "testing"

// SearchAtRandom plays the random scripts of Search only.
func SearchAtRandom(h Harness, t *testing.T) error { return h.searchAtRandom(t) }
