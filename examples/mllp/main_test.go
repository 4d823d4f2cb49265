package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out, nil))
	require.Equal(t, "MSG00001: <nil>\nMSG00002: refused (AE): no patient\nMSG00003: <nil>\nconnections opened: 1\n", out.String())
	require.Error(t, run(&out, []string{"nowhere"}))
}

func senderTo(t *testing.T, w *ward) (*sender, *loopback.Server) {
	t.Helper()
	server, err := loopback.Start(w.serve)
	require.NoError(t, err)
	t.Cleanup(server.Close)
	s, err := newSender(server.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { s.pool.Close() })
	return s, server
}

func TestEverySenderGetsTheAcknowledgementOfItsOwnMessage(t *testing.T) {
	w := new(ward)
	s, server := senderTo(t, w)
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			for i := range 25 {
				patient := fmt.Sprint("PAT", worker)
				if i%5 == 0 {
					patient = ""
				}
				err := s.deliver(t.Context(), admission(fmt.Sprintf("M%d-%d", worker, i), patient))
				if (err != nil) != (patient == "") {
					t.Errorf("worker %d, message %d: %v", worker, i, err)
				}
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, s.pool.Stats().PeakOpen, 2)
	require.Less(t, server.Accepted(), 10, "40 refusals cost no connection")
	require.Len(t, w.received, 8*20)
}

func TestLateAcknowledgementConfirmsNothingElse(t *testing.T) {
	late := make(chan struct{})
	w := &ward{before: func(m message) {
		if m.control() == "LATE" {
			<-late
		}
	}}
	s, server := senderTo(t, w)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, s.deliver(ctx, admission("LATE", "P")), context.DeadlineExceeded)
	close(late)
	var no *refusal
	require.ErrorAs(t, s.deliver(t.Context(), admission("NEXT", "")), &no, "the refusal of this one, not the consent to the last")
	require.Equal(t, 2, server.Accepted())
	require.Error(t, s.deliver(t.Context(), message("PID|1\x1c")))
}
