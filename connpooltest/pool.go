package connpooltest

import (
	"context"
	"fmt"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// profileName is the name of the Profile for go tool pprof.
const profileName = "github.com/seed-ecb488c9/connpool/connpooltest.loans"

// loans is the Profile of pools that NewPool makes. Profiles have names for the whole
// process, so there is only one.
var loans = sync.OnceValue(func() *pprof.Profile {
	return pprof.NewProfile(profileName)
})

// NewPool makes a pool that reaches the server, see [Server.Config]. When the test ends
// (the clean-up of the test runs last in, first out) every connection must have been
// given back, as [AssertReturned] checks, and the pool is closed.
//
// If cfg has no Profile, the pool records where connections were borrowed, so that
// AssertReturned can say it.
func NewPool(t testing.TB, s *Server, cfg connpool.Config) *connpool.Pool {
	t.Helper()
	cfg = s.Config(cfg)
	if cfg.Profile == nil {
		cfg.Profile = loans()
	}
	pool, err := connpool.New(cfg)
	if err != nil {
		t.Fatal("connpooltest: ", err)
	}
	t.Cleanup(func() {
		AssertReturned(t, pool)
		ctx, cancel := context.WithTimeout(context.Background(), grace)
		defer cancel()
		if err := pool.Shutdown(ctx); err != nil {
			t.Error("connpooltest: the pool cannot be closed: ", err)
		}
	})
	return pool
}

// AssertReturned fails the test if connections of the pool are in use, or borrowers wait
// for one. It waits for up to a minute until none are: connections may be on their way
// back, or being closed. In a bubble this minute takes no time.
//
// It sees every connection that was borrowed and not given back: by a With whose function
// has not returned, by a lease or session that was not ended, and by a goroutine that hangs
// in one of these. A goroutine that the client left behind without a connection is found by
// the end of a bubble, which fails the test for it.
func AssertReturned(t testing.TB, pool *connpool.Pool) {
	t.Helper()
	if out := returned(pool, grace); out != "" {
		t.Error("connpooltest: a connection was not given back: " + out)
	}
}

// returned waits until nothing is in use, for d at most. It returns "", or what is.
func returned(pool *connpool.Pool, d time.Duration) string {
	pause := time.Millisecond
	for end := time.Now().Add(d); ; pause = min(2*pause, 50*time.Millisecond) {
		st := pool.Stats()
		if st.InUse+st.Waiting+st.Closing+st.Dialing == 0 {
			return ""
		}
		if time.Now().After(end) {
			return fmt.Sprintf("connections in use: %d, being closed: %d, being dialled: %d; borrowers waiting: %d%s",
				st.InUse, st.Closing, st.Dialing, st.Waiting, places())
		}
		time.Sleep(pause)
	}
}

// places says where the connections in use were borrowed, of all pools that NewPool made.
func places() string {
	profile := pprof.Lookup(profileName)
	if profile == nil || profile.Count() == 0 {
		return ""
	}
	var text strings.Builder
	profile.WriteTo(&text, 1)
	return "\nborrowed here, from all pools of NewPool in this process:\n" + text.String()
}
