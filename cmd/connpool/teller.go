package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// teller writes in the background, in order, so that nobody waits for a reader that has
// stopped. It is for little text: what it cannot write stays in memory until the end.
type teller struct {
	w io.Writer

	mu      sync.Mutex // guards the fields below; nothing is written under it
	waiting [][]byte
	ended   chan struct{} // closed when everything is written; nil: no goroutine writes
}

func (t *teller) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting = append(t.waiting, append([]byte(nil), b...))
	if t.ended == nil {
		t.ended = make(chan struct{})
		go t.write(t.ended)
	}
	return len(b), nil
}

func (t *teller) write(ended chan struct{}) {
	defer close(ended)
	for {
		t.mu.Lock()
		batch := t.waiting
		t.waiting = nil
		if len(batch) == 0 {
			t.ended = nil
			t.mu.Unlock()
			return
		}
		t.mu.Unlock()
		for _, b := range batch {
			t.w.Write(b) // if the reader is gone there is nothing to report
		}
	}
}

// lastWords is how long writing a report may take when the process ends.
const lastWords = time.Second

// flush waits until everything is written, for lastWords at most; with report, when the
// report is the purpose of the command, until ctx is done.
func (t *teller) flush(ctx context.Context, report bool) {
	t.mu.Lock()
	ended := t.ended
	t.mu.Unlock()
	if ended == nil {
		return
	}
	if report {
		select {
		case <-ended:
		case <-ctx.Done():
		}
	}
	late := time.NewTimer(lastWords)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
	}
}

var errNotWaited = errors.New("told to end before it was ready")

// within runs a function that may hang in a system call, such as opening a file on a
// server that is down. It waits until a second after ctx is done, and no longer: the
// process then ends, and the hanging call with it.
func within(ctx context.Context, do func() error) error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	late := time.NewTimer(lastWords)
	defer late.Stop()
	select {
	case err := <-done:
		return err
	case <-late.C:
		return fmt.Errorf("%w: %w", errNotWaited, context.Cause(ctx))
	}
}
