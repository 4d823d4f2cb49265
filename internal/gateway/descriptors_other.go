//go:build !unix

package gateway

// There is no limit that could be asked for.
func descriptorLimit() int { return 0 }
func descriptorsOpen() int { return 0 }
