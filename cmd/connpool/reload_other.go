//go:build windows || js || plan9

package main

import "os"

// reloadSignal returns nil: this system has no such signal; the files are checked
// regularly.
func reloadSignal() (<-chan os.Signal, func()) { return nil, func() {} }

// ignoreBrokenPipes does nothing: on this system a pipe without a reader ends no process.
func ignoreBrokenPipes() {}
