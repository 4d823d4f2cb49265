//go:build !unix

package connpool

func fits(uintptr) bool { return false }
