// Package tasks is sync.WaitGroup with the method Go, which package sync has since Go 1.25.
package tasks

import "sync"

// Group is a sync.WaitGroup. Its zero value is ready.
type Group struct{ sync.WaitGroup }

// Go runs f on a goroutine of its own, for which Wait waits.
func (g *Group) Go(f func()) {
	g.Add(1)
	go func() {
		defer g.Done()
		f()
	}()
}
