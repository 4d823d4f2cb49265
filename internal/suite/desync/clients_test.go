package desync

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/pooltest"
	"github.com/seed-ecb488c9/connpool/internal/race"
	"github.com/seed-ecb488c9/connpool/internal/short"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The oracle over clients that do the I/O of their connection. Of the addresses of one server, the
// first has plain connections, the second Resident clients, the third clients of Carry. Replies
// come late and out of order. A resident or carried client matches them by an id, so that its
// connection outlives a reply that its borrower gave up; a plain connection must not.

// kinds of connections, by the address.
const (
	plain = iota
	resident
	carried
	numKinds
)

// lasts is how long half of the clients may be lent. One loan in a hundred lasts for longer.
const lasts = 20 * time.Millisecond

// most is the limit on connections of each address.
var most = [numKinds]int{plain: 3, resident: 2, carried: 1}

// crowd is the clients of one pool, and what they and their borrowers met.
type crowd struct {
	desyncer
	addrs [numKinds]connpool.Addr

	lent                                                    [numKinds]atomic.Int64
	answered, gaveUp, tardy, ended, selfCut, keptOn, blamed atomic.Int64

	mu  sync.Mutex // guards all
	all []*member
}

func (d *crowd) kindOf(a connpool.Addr) int {
	for kind, one := range d.addrs {
		if a == one {
			return kind
		}
	}
	return plain
}

// member is a client that reads all the time and matches replies by an id.
type member struct {
	d     *crowd
	no    int
	nc    net.Conn
	until time.Time
	done  chan struct{}

	lent   atomic.Bool
	closes atomic.Int64
	asked  atomic.Int64 // calls of alive under way

	mu   sync.Mutex // guards what follows, and writes
	wait map[string]chan string
	err  error
}

func (d *crowd) newMember(nc net.Conn) *member {
	m := &member{d: d, nc: nc, done: make(chan struct{}), wait: make(map[string]chan string)}
	d.mu.Lock()
	d.all = append(d.all, m)
	m.no = len(d.all)
	if m.no%2 == 0 {
		m.until = time.Now().Add(lasts)
	}
	d.mu.Unlock()
	go m.read()
	return m
}

func (m *member) Expires() time.Time { return m.until }

func (m *member) read() {
	defer close(m.done)
	in := bufio.NewScanner(m.nc)
	for in.Scan() {
		id, text, _ := strings.Cut(in.Text(), " ")
		m.mu.Lock()
		if w := m.wait[id]; w != nil {
			delete(m.wait, id)
			w <- text
		} else if id != "*" {
			m.d.tardy.Add(1)
		}
		m.mu.Unlock()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err = in.Err(); m.err == nil {
		m.err = io.EOF
	}
	m.d.ended.Add(1)
}

func (m *member) alive() error {
	if m.asked.Add(1) > 1 || m.lent.Load() {
		m.d.accuse("a client was asked how it is by two at once, or in a loan")
	}
	defer m.asked.Add(-1)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *member) ask(ctx context.Context, token string, wait time.Duration) error {
	w := make(chan string, 1)
	m.mu.Lock()
	m.wait[token] = w
	_, err := fmt.Fprintf(m.nc, "%s %s\n", token, token)
	m.mu.Unlock()
	if err != nil {
		return errGone
	}
	late := time.NewTimer(wait)
	defer late.Stop()
	select {
	case text := <-w:
		if text != token {
			m.d.accuse("asked for %s, got %q", token, text)
		}
		m.d.answered.Add(1)
		return nil
	case <-late.C:
		err = errImpatient
	case <-ctx.Done():
		err = ctx.Err()
	case <-m.done:
		err = errGone
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.wait, token)
	return err
}

// Close says goodbye, and ends the reading.
func (m *member) Close() error {
	if m.closes.Add(1) > 1 {
		m.d.accuse("a client was closed twice")
	}
	io.WriteString(m.nc, "bye bye\n")
	m.nc.Close()
	<-m.done
	return nil
}

var (
	errImpatient = errors.New("impatient")
	errGone      = errors.New("the client has ended")
)

// answersByID answers each line with itself, some late, so that later ones overtake them. It hangs up
// on one connection in nine after its twentieth request, and speaks to clients unasked.
func answersByID(p *faultnet.Peer) {
	in := bufio.NewScanner(p)
	var replies tasks.Group
	defer replies.Wait()
	for seq := 1; in.Scan(); seq++ {
		line := in.Text()
		if strings.HasPrefix(line, "bye") {
			return
		}
		if p.Serial()%9 == 4 && seq == 20 {
			return
		}
		if seq%16 == 7 && !strings.HasPrefix(line, "plain") {
			io.WriteString(p, "* by the way\n")
		}
		if seq%8 == 3 {
			replies.Go(func() {
				time.Sleep(time.Duration(300+37*p.Serial()%400) * time.Microsecond)
				fmt.Fprintln(p, line)
			})
			continue
		}
		fmt.Fprintln(p, line)
	}
}

// ADO-01, ADO-05, ADO-11: no reply reaches the wrong borrower, nobody shares a client, and each client
// is closed once.
func TestDesyncNorIfClientsDoTheIOOfTheirConnections(t *testing.T) {
	total := short.Of(8_000, 1_200)
	switch {
	case patience.Stress() > 1:
		total = 200_000
	case race.Enabled:
		total = short.Of(4_000, 1_200)
	}
	for _, name := range []string{"tcp", "unix", "tls13"} {
		t.Run(name, func(t *testing.T) {
			total := total
			if name == "tls13" { // a handshake costs a hundred exchanges
				total /= 4
			}
			n := pooltest.StartSock(t, name, faultnet.Options{Handler: answersByID})
			d := &crowd{desyncer: desyncer{n: n}}
			for kind := range d.addrs {
				d.addrs[kind] = pooltest.Scoped(n.Addr, kind)
			}
			d.p = n.Pool(t, d.configure)
			var wg tasks.Group
			for w := range 8 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), uint64(total)))
					for d.exchanges.Add(1) <= int64(total) && d.foreign.Load() == nil {
						d.visit(rng)
						if err := pooltest.Inconsistency(d.p); err != nil {
							d.accuse("%v", err)
						}
					}
				})
			}
			wg.Wait()
			if what := d.foreign.Load(); what != nil {
				t.Fatal(*what)
			}
			st := pooltest.Settled(t, d.p)
			t.Logf("%d clients, %d answers, %d given up, %d came late, %d clients ended, %d by themselves, %d kept by KeepErr; %v",
				len(d.all), d.answered.Load(), d.gaveUp.Load(), d.tardy.Load(), d.ended.Load(), d.selfCut.Load(), d.keptOn.Load(), st.Closed)
			require.Greater(t, d.answered.Load(), int64(total/4))
			require.Greater(t, st.Reused, uint64(total/20))
			require.Greater(t, d.tardy.Load(), int64(total/500), "replies to requests that were given up")
			require.Greater(t, d.keptOn.Load(), int64(total/100))
			reasons := []connpool.CloseReason{connpool.ClosedCanceled, connpool.ClosedFnError, connpool.ClosedByBorrower}
			if total >= 4_000 { // these are rare
				reasons = append(reasons, connpool.ClosedPanic, connpool.ClosedExpired)
			}
			for _, reason := range reasons {
				require.NotZero(t, st.Closed[reason], reason)
			}
			require.LessOrEqual(t, st.Closed[connpool.ClosedFnError], uint64(d.blamed.Load()), "closed for an error that KeepErr finds harmless")
			require.NoError(t, d.p.Close())
			require.NoError(t, d.p.Shutdown(context.Background()))
			d.mu.Lock()
			defer d.mu.Unlock()
			for _, m := range d.all {
				<-m.done
				require.EqualValues(t, 1, m.closes.Load(), "closes of a client")
			}
		})
	}
}

// configure makes the pool of such a crowd.
func (d *crowd) configure(c *connpool.Config) {
	c.MaxOpen = 5 // less than all addresses may have
	c.LimitsFor = func(a connpool.Addr) (connpool.AddrLimits, error) {
		return connpool.AddrLimits{MaxOpen: most[d.kindOf(a)]}, nil
	}
	c.KeepErr = func(_ connpool.Addr, err error) bool { return errors.Is(err, errAbsent) }
	c.Setup = func(_ context.Context, a connpool.Addr, nc net.Conn) (any, error) {
		if d.kindOf(a) != resident {
			return nil, nil
		}
		m := d.newMember(nc)
		return connpool.Resident(m, m.alive), nil
	}
	if d.n.TLS {
		d.addrs[carried] = d.addrs[resident] // a dialer of TLS has the handshake to do
		return
	}
	c.Dialers = map[connpool.Transport]connpool.DialFunc{d.n.Addr.Transport: func(ctx context.Context, a connpool.Addr) (net.Conn, error) {
		network, address := "tcp", net.JoinHostPort(a.Host, fmt.Sprint(a.Port))
		if a.Transport == connpool.Unix {
			network, address = "unix", a.Host
		}
		nc, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil || d.kindOf(a) != carried {
			return nc, err
		}
		m := d.newMember(nc)
		if m.no%4 < 2 { // it shows no socket
			nc = nil
		}
		return connpool.Carry(m, m.alive, nc), nil
	}}
}

// visit is one use of the pool.
func (d *crowd) visit(rng *rand.Rand) {
	kind := rng.IntN(numKinds)
	addr := d.addrs[kind]
	kind = d.kindOf(addr)
	ctx, cancel := context.WithCancel(context.Background())
	moment := time.Duration(rng.IntN(500)) * time.Microsecond
	how := rng.IntN(16)
	wait := time.Minute
	switch how {
	case 0, 1: // does not wait for a late reply
		wait = moment
	case 2:
		ctx, cancel = context.WithTimeout(ctx, moment)
	case 3:
		defer time.AfterFunc(moment, cancel).Stop()
	case 4:
		d.p.EvictLRU()
	case 5:
		if rng.IntN(16) == 0 {
			d.p.Retire(addr)
		}
	}
	defer cancel()
	panics := false
	defer func() {
		if v := recover(); v != nil && !panics {
			panic(v)
		}
	}()
	err := d.p.With(ctx, addr, func(c connpool.Conn) (err error) {
		defer func() {
			if err != nil && err != errAbsent && ctx.Err() == nil {
				d.blamed.Add(1)
			}
		}()
		leaves := func() {} // called before what closes the connection in the middle of the loan
		if how != 2 && how != 3 {
			if n := d.lent[kind].Add(1); n > int64(most[kind]) {
				d.accuse("%d loans of an address that may have %d connections", n, most[kind])
			}
			leaves = sync.OnceFunc(func() { d.lent[kind].Add(-1) })
			defer leaves()
		}
		var m *member
		if kind == plain {
			if err := d.plainly(c, wait); err != nil {
				return err
			}
		} else {
			m = connpool.State[*member](c)
			if m.lent.Swap(true) {
				d.accuse("a client was lent twice at once")
			}
			defer m.lent.Store(false)
			for range 1 + rng.IntN(3) {
				if err := m.ask(ctx, faultnet.NewToken(), wait); errors.Is(err, errImpatient) {
					d.gaveUp.Add(1) // the reply comes later, and is the client's matter
				} else if err != nil {
					return err
				}
			}
		}
		switch how {
		case 6:
			return pooltest.ErrBoom
		case 7, 8:
			d.keptOn.Add(1)
			return errAbsent
		case 9:
			leaves()
			return c.Close()
		case 10:
			if m != nil && rng.IntN(4) == 0 {
				d.selfCut.Add(1)
				leaves()
				m.nc.Close()
			}
		case 12:
			if rng.IntN(8) == 0 {
				time.Sleep(2 * lasts)
			}
		case 11:
			if panics = rng.IntN(8) == 0; panics {
				panic(pooltest.ErrBoom)
			}
		}
		return nil
	})
	var pe *connpool.Error
	switch {
	case errors.As(err, &pe) && pe.Stage == connpool.StageSetup: // on a busy machine a client has expired already
	case err == nil, errors.Is(err, pooltest.ErrBoom), errors.Is(err, errAbsent), errors.Is(err, errImpatient), errors.Is(err, errGone), ctx.Err() != nil:
	default:
		d.accuse("%v", err)
	}
}

// plainly asks over a plain connection.
func (d *crowd) plainly(c connpool.Conn, wait time.Duration) error {
	token := "plain" + faultnet.NewToken()
	c.SetReadDeadline(time.Now().Add(wait))
	if _, err := fmt.Fprintf(c, "%s\n", token); err != nil {
		return errGone
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	switch {
	case connpool.KindOf(err) == connpool.KindTimeout, connpool.KindOf(err) == connpool.KindTimeoutInTransfer:
		return errImpatient
	case err != nil:
		return errGone
	case line != token+"\n":
		d.accuse("asked for %s, got %q", token, line)
	}
	d.answered.Add(1)
	return nil
}
