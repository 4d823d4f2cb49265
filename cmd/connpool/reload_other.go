//go:build windows || js || plan9

package main

import "os"

// reloadSignal: there is no such signal here; the files are looked at.
func reloadSignal() (<-chan os.Signal, func()) { return nil, func() {} }

// ignoreBrokenPipes: a pipe without a reader ends nobody here.
func ignoreBrokenPipes() {}
