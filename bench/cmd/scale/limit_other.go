//go:build !unix

package main

func descriptors() uint64 { return 16384 }
