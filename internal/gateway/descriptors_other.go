//go:build !unix

package gateway

// descriptorLimit returns 0: these systems have no limit to ask for.
func descriptorLimit() int { return 0 }
func descriptorsOpen() int { return 0 }
